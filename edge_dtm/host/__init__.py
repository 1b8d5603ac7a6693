"""The host side: measures, searches and exports. Needs torch and transformers."""
