"""Credits: what is granted, used, charged and paid."""
