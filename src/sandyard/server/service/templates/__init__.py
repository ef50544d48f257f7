"""The templates of the installation, and those of organizations with their versions and tags."""
