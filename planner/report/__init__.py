"""`plan report`: a plan as one static HTML page, a file a section; and as a trace of its step."""
