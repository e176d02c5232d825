"""`segdiff reproduce`: a published table made again, end to end, and what differs said beside it."""
