"""Files that are spoiled at random, and what may come of reading them."""
