"""What is made ahead: golden machines, and clones of them that wait."""
