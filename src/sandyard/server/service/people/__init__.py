"""Who people are, and what opens the door to them."""
