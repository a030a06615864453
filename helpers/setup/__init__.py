"""00: models, data and quantization methods, and all that knows a quantized layer or a device."""
