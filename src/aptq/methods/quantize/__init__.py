"""Methods that round weights to a grid."""
