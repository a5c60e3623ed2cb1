"""The foundation that every room may import; it imports none of them."""
