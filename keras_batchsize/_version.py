"""The version, alone in its module.

setup.cfg reads it with `attr:`, which finds a literal without importing the
package, so building and asking for the version need no TensorFlow.
"""

__version__ = "0.1.0"
