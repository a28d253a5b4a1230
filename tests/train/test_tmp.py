from tests.train import quick_run
import time
def test_a(whole_run, small_command, tmp_path):
    for l in quick_run.logged(whole_run): print(l)
    for p in whole_run.iterdir(): print(p.name, p.stat().st_size)
    t=time.time()
    print(quick_run.run([*small_command, "--out", str(tmp_path/"b")], tmp_path/"log"))
    print(time.time()-t)
    quick_run.assert_same_run(tmp_path/"b", whole_run)
    print(quick_run.run([*small_command, "--out", str(tmp_path/"b")], tmp_path/"log"))
    quick_run.assert_same_run(tmp_path/"b", whole_run)
    print(quick_run.run([*small_command, "--share", "0.2", "--out", str(tmp_path/"c")], tmp_path/"log"))
    for l in quick_run.logged(tmp_path/"c"): print(l)
