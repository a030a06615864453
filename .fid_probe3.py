import torch
from helpers import params, models, fidelity, coqa, noise, weights
study=params.read_study("smollm2-135m")
L=lambda n: models.load(study, params.read_configuration("smollm2-135m",n))
full,q=L("fp16"),L("nf4")
texts=fidelity.encode(coqa.read("embedded",2),full.tokenizer)
layer=q.model.model.layers[0].self_attn.k_proj
stored=weights.dequantize(layer).clone()
new=noise.nf4(full.model)
print("RES stored equals round trip", (stored-new["model.layers.0.self_attn.k_proj"]).abs().max().item())
base=[fidelity.hidden_states(full.model,[t])[0] for t in texts]
with noise.swapped(full.model,new): sw=[fidelity.hidden_states(full.model,[t])[0] for t in texts]
lib=[fidelity.hidden_states(q.model,[t])[0] for t in texts]
print("RES repacked", getattr(layer.weight.quant_state,"packing_format_for_cpu",None), layer.weight.quant_state.dtype, layer.weight.quant_state.absmax.dtype)
with torch.inference_mode(): im=layer(torch.eye(layer.in_features)).T
w=full.model.model.layers[0].self_attn.k_proj.weight
rel=lambda a,b: (weights.squared_error(a,b)/weights.squared_size(b))
print("RES rel err image vs stored",rel(im,stored),"image vs full",rel(im,w),"stored vs full",rel(stored,w))
h=full.model.get_output_embeddings()
import numpy as np
def cmp(a,b):
    r=[fidelity.compare_text(t,x,h,y,h) for t,x,y in zip(texts,a,b)]
    return {k:float(np.concatenate([q[k] for q in r]).mean()) for k in r[0]}
print("RES full->swap",cmp(base,sw)); print("RES full->lib",cmp(base,lib)); print("RES swap->lib",cmp(sw,lib))
