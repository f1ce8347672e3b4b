"""Published runs against predictions: rows read, configured, predicted, scored."""
