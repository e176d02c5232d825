"""Images that other systems made, with their masks: files in two folders, read and stored as samples to evaluate."""
