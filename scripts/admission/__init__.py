"""The admission benchmark: rules of the request scheduler on recorded traffic."""
