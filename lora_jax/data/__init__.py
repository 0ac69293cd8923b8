"""Data: readers that give pairs of texts or plain text, and the schedules of batches over them."""
