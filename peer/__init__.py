"""One volunteer: everything that a peer does besides speaking to the DHT."""
