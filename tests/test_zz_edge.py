import numpy as np, torch
from conftest import Made
from edge_dtm import ggml
from edge_dtm.host.compensate import Feedback, compensate
from edge_dtm.host.sensitivity import edge_feedback
from edge_dtm.plan import CANDIDATE_TYPES
def test_x(made):
    types=[t for t in CANDIDATE_TYPES if t!="F16"]
    w=made.weights("output"); f=edge_feedback(made.calibration,{},made.component("output"),False)
    rows=np.random.default_rng(0).permutation(len(w))[:300]
    m=compensate(torch.from_numpy(w[rows]),types,f); full=compensate(torch.from_numpy(w),types,f)
    g=Feedback(f.moments,0.0); again=compensate(torch.from_numpy(w),types,g)
    # power-of-two normalisation
    for t,a,b,c in zip(types,m,full,again):
        print(t,"same feedback:",(a[0]!=b[0][rows]).mean(),"restored:",(a[0]!=c[0][rows]).mean(), "rows with any difference", (a[0]!=b[0][rows]).any(1).mean(), (a[0]!=c[0][rows]).any(1).mean(), "maxdiff",float((a[1]-c[1][rows]).abs().max()))
