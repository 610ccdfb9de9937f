from test_elastic_folders import *
from test_elastic_folders import pipeline, evolved
def test_dbg(tiny_folder, evolved, tmp_path):
    out = tmp_path / "evolved"
    out.mkdir()
    copy_with_unet(tiny_folder, out, evolved, dtype=torch.float32)
    lo=load_pipeline(out).unet
    print("mis", len([n for n,t in lo.named_parameters() if t.data_ptr()%64]), len([n for n,t in evolved.named_parameters() if t.data_ptr()%64]))
    aligned(lo)
    a,b=run(evolved,GIVEN),run(lo,GIVEN); print(torch.equal(a,b))
    print("mis", len([n for n,t in lo.named_parameters() if t.data_ptr()%64]), len([n for n,t in evolved.named_parameters() if t.data_ptr()%64]))
    print("stable", torch.equal(run(evolved,GIVEN),a), torch.equal(run(lo,GIVEN),b))
    import copy
    print("sd", all(torch.equal(x,y) for x,y in zip(evolved.state_dict().values(), lo.state_dict().values())))
    aligned(evolved); print("ev realigned", torch.equal(run(evolved,GIVEN),a), torch.equal(run(evolved,GIVEN),b))
    taps={}
    for u,k in ((evolved,"e"),(lo,"l")):
        for n,m in u.named_modules():
            if not list(m.children()): m.register_forward_hook(lambda m,i,o,n=n,k=k: taps.setdefault(n,{}).update({k:(i[0].clone(),o.clone(),i[0].stride())}))
    run(evolved,GIVEN); run(lo,GIVEN)
    for n,v in taps.items():
        if not torch.equal(v["e"][1],v["l"][1]): print("first", n, torch.equal(v["e"][0],v["l"][0]), v["e"][0].shape, v["e"][2], v["l"][2]); break
    for t in GIVEN.values(): print(t.data_ptr()%64)
    assert 0
