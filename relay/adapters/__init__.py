"""One module per outside system; each keeps a promise of `relay.ports`."""
