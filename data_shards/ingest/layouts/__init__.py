"""Layouts of data folders: a layout recognises a folder and lists its cases. `find` determines a folder's layout."""
