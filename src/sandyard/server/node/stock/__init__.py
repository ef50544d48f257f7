"""What is made ahead: golden machines, and waiting clones of them."""
