"""Networks and steps through the public API, in every lane."""
