"""What sandboxes may reach: their rules, the secrets in their requests, and their journals."""
