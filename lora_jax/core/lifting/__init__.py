"""`lift`: an interpreter of jaxprs, its rules for products, axes and control flow, and taps at named activations."""
