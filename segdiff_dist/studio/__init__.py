"""The page of `segdiff studio`: plain files, served beside the service that paints."""
