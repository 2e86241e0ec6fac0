"""Training where there is no network: pack here, carry in parts, install, train and evaluate there, carry home."""
