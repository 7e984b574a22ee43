"""Token classification: a label for every word of a text, such as for named entity recognition."""
