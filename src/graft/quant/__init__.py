"""Room: quant."""
