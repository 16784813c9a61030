"""Files in object stores and on servers, by URL."""
