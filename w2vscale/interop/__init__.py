"""Import models from other libraries, and export models to them."""
