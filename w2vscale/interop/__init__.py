"""State-dict maps to and from other libraries."""
