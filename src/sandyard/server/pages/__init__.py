"""Pages for people in a browser: terminal, desktop, API docs, welcome page."""
