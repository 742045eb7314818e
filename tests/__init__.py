"""The tests, in folders named as what they test; what tests the whole lies here."""
