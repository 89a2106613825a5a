"""What is computed: the transformer and its loss."""
