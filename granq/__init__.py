"""GranQ Pipeline: zero-shot quantization of CNNs as a service. This package is the client; it needs grpcio and protobuf."""
