"""`segdiff reproduce`: a published table made again, end to end, with a list of all differences."""
