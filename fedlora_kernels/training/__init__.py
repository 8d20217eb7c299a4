"""What a client runs during local training: small torch helpers, one file per method."""
