"""What codecs compute with: a numpy reference, which is the specification, and fast versions."""
