"""Starting runs of many processes."""
