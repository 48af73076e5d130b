"""The swarm's shared memory: small signed records that expire. It carries no tensors.

- `identity`: the Ed25519 key that is both a peer's libp2p ID and the signature on its records;
- `records` and `keys`: what peers say about themselves, to the byte, and where it lies;
- `validation` and `storage`: what every node checks before it stores or believes a record, and
  how much it keeps;
- `swarm`: the interface the rest of the program uses, with two implementations:
  `kademlia` (hivemind's DHT over libp2p) and its twin `memory`;
- `hardening`: what makes hivemind's DHT safe against hostile peers;
- `daemon` and `control`: p2pd, the process that speaks libp2p for us, and what we ask of it;
- `addresses`: multiaddrs of peers, checked and read;
- `errors`: the one tree of errors.

The DHT holds rumors: a lie in it may hide a peer, and never changes training.
"""
