"""What a conversion will write, settled before the first byte: rules, config fields, adapters."""
