"""What may be done with sandboxes."""
