"""The pages for people: figures, the report of a run, and the comparison of several runs. Imports stay light."""
