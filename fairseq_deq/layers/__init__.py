"""What f can be: a folder for each family, the interface of a layer, and the parts that layers share."""
