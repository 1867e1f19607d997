"""From values to the bytes of a shard and back: dtypes, codecs, lossy presets, shard files. Uses `storage`."""
