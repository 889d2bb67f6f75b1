"""The service: answers HTTP with the Production model and the feature store; computes no feature itself."""
