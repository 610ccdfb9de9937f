"""stub"""
def write_page(chain, out): return out / "report.html"
