"""Folders as people have them: a layout recognises one and lists its cases. `find` says which layout a folder has."""
