"""Pages for people: one HTML file each that needs nothing beside it."""
