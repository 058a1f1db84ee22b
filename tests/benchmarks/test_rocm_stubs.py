"""What a shared object wants, read from what readelf prints."""

from benchmarks.rocm_stubs import Symbol, needs, source, version_script

DYNAMIC = """
 0x0000000000000001 (NEEDED)             Shared library: [libamdhip64.so.7]
 0x0000000000000001 (NEEDED)             Shared library: [librocblas.so.5]
 0x0000000000000001 (NEEDED)             Shared library: [libc.so.6]
"""
VERSIONS = """
  000000: Version: 1  File: libc.so.6  Cnt: 1
  0x0010:   Name: GLIBC_2.14  Flags: none  Version: 9
  0x0020: Version: 1  File: libamdhip64.so.7  Cnt: 1
  0x0030:   Name: hip_4.2  Flags: none  Version: 5
"""
SYMBOLS = """
     1: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND memcpy@GLIBC_2.14 (9)
     2: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND hipMalloc@hip_4.2 (5)
     3: 0000000000000000     0 NOTYPE  GLOBAL DEFAULT  UND rocblas_sgemm
     4: 0000000000000000     0 NOTYPE  GLOBAL DEFAULT  UND PyErr_Clear
     5: 0000000000000f00    16 FUNC    GLOBAL DEFAULT   14 hipDefinedHere
"""


def test_functions_of_rocm_are_wanted_by_library_and_version():
    found = needs(DYNAMIC, VERSIONS, SYMBOLS)
    assert found.libraries == {"libamdhip64.so.7", "librocblas.so.5"}
    assert found.symbols == {
        "libamdhip64.so.7": {Symbol("hipMalloc", "hip_4.2")},
        "": {Symbol("rocblas_sgemm", "")},
    }


def test_stand_ins_say_that_there_is_no_device():
    symbols = {Symbol("hipMalloc", "hip_4.2"), Symbol("hipFree", "hip_4.2")}
    assert source(symbols).splitlines() == [
        "int hipFree() { return 100; }",
        "int hipMalloc() { return 100; }",
    ]
    assert version_script(symbols) == "hip_4.2 { global: hipFree; hipMalloc; };\n"
    assert source(()) == "int stand_in;\n" and version_script({Symbol("rocblas_sgemm", "")}) == ""
