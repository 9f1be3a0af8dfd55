"""Files as a client sends them, by the names that tests of the server use: see `dicom_files`."""

from dicom_files import encode_picture as encoded
from dicom_files import patient_film as film
from dicom_files import picture as grey
from dicom_files import to_bytes as written

__all__ = ["encoded", "film", "grey", "written"]
