"""What several test files share: small models, small runs, references to compare with."""
